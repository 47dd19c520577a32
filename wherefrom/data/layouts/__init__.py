"""Readers of the layouts that folders of captioned images come in: one file a layout, one interface."""
