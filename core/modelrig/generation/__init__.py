"""From a prompt to text: inputs, the loop, sampling, stops, streaming, sessions, tokenizers and chat templates."""
