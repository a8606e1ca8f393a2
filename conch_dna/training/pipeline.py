"""A doorway: `conch_dna.training.pipeline` is where the documents look for TrainingPipeline.

It hands the names on and knows nothing; what they do stands in conch_dna/retraining/pipeline.py.
Nothing in the package imports from here.
"""

from conch_dna.retraining.pipeline import RetrainAdvice, TrainingPipeline

__all__ = ["RetrainAdvice", "TrainingPipeline"]
