"""What a model is: Hugging Face configs, parameters as data, and one decoder for every family."""
