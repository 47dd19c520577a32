"""wherefrom: which training images did this picture come from?"""
