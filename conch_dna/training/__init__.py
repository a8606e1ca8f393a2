"""TRUE knowledge distillation: a teacher's distributions into one LoRA adapter per domain.

This file imports nothing, so that ``python -m conch_dna.training.true_kd`` runs its module once.
Public names of the wing stand in ``conch_dna.training.true_kd``.
"""
