"""What measures trained dictionaries: reconstruction, what the denoiser makes of it, and the report of both."""
