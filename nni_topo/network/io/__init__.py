"""Dense models in files: checkpoints, folders of Transformers, exports."""
