"""openunirl: self-improving unified multimodal models (UniRL, arXiv 2505.23380)."""
