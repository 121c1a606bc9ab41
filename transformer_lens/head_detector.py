"""Head detection under its known import path; see `transformer_lens.analysis.head_detection`."""

from transformer_lens.analysis.head_detection import (
    HEAD_NAMES,
    ErrorMeasure,
    HeadName,
    detect_head,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)

__all__ = [
    "HEAD_NAMES",
    "ErrorMeasure",
    "HeadName",
    "detect_head",
    "get_duplicate_token_head_detection_pattern",
    "get_induction_head_detection_pattern",
    "get_previous_token_head_detection_pattern",
]
