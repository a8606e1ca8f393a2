"""What a student learns from: records, answers, examples."""
