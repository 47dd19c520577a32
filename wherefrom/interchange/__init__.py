"""Files of other projects of this field, read into and written from what is used here."""

from wherefrom.interchange.fastgda import read_fastgda_ranker, read_fastgda_teacher, write_fastgda_ranker
from wherefrom.interchange.safe_pickle import read_pickle

__all__ = ["read_fastgda_ranker", "read_fastgda_teacher", "read_pickle", "write_fastgda_ranker"]
