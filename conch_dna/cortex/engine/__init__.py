"""One base model, many adapters: requests answered in shared batches."""
