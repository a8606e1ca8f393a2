"""Learning from the student's own answers: rollouts, their batches, and who is in memory when."""
