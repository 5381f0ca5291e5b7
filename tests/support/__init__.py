"""What tests lean on: real servers, tiny real models, hostile blocks."""
