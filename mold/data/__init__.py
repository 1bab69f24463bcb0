"""Examples: read, split into steps and key words, rendered, tokenised; and answers judged."""
