"""The interactive page: its logic, its layout in Gradio, and the command."""
