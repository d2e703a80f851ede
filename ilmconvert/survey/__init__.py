"""Convert every model of a library, check each conversion, and keep what came out: the coverage table.

One model is one task in a worker process (:mod:`ilmconvert.survey.pool`), examined by
:mod:`ilmconvert.survey.examine` against a walk of its own (:mod:`ilmconvert.survey.walk`); records are appended to a
file of JSON Lines (:mod:`ilmconvert.survey.records`) and become a table (:mod:`ilmconvert.survey.table`).
"""

from ilmconvert.survey.records import Log, Record, Session, read_log
from ilmconvert.survey.run import SurveyOptions, run_survey
from ilmconvert.survey.table import coverage_page, is_page

__all__ = ["Log", "Record", "Session", "SurveyOptions", "coverage_page", "is_page", "read_log", "run_survey"]
