"""Where in which denoising loop a transformer call is: the one answer that all patches use."""
