"""Where documents and their vectors lie: a folder, a Qdrant server, or memory."""
