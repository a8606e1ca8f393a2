"""What sedimentation gains on collections with judgements."""
