"""The web page: one worker draws and trains what browsers ask for. `controls`, `page` and `look` need Gradio."""
