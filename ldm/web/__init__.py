"""The web page: one worker draws and trains what the browser asks for. Gradio is imported in `page` and `serve` only."""
