"""The classes that the metrics of this project are made of: a subclass says what is better, and computes."""

import datasets
import evaluate


class TextMetric(evaluate.Metric):
    """Compares texts with references: a subclass has `_compute(predictions, references)`, name -> a score for each row.

    `higher_is_better` or `lower_is_better` is True, or a mapping of score names where a metric has several; where
    neither is said, a report says "changed" and not "better". `shown_as` gives scores their names in a report.
    With `corpus = True`, `_compute` gives one number for all rows, and its interval is made by computing it again on
    resampled rows. Any other `evaluate.Metric` may say the same.
    """

    kind = "string"

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value(self.kind)))
        about = type(self).__doc__ or type(self).__name__
        return evaluate.MetricInfo(description=about, citation="", inputs_description="", features=features)


class ClassMetric(TextMetric):
    """Compares numbers of classes."""

    kind = "int64"
