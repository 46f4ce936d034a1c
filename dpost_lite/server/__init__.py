"""A local server of one exported model: OpenAI's interface, and a page to ask in."""
