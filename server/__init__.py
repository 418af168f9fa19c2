"""Text, HTTP and process start. The only floor that knows fastapi, pydantic and tokenizers."""
