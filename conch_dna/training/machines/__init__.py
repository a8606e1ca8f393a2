"""Teachers and helpers elsewhere: behind a URL, or in other processes of mlx.launch."""
