"""The interactive page: what it does (studio_logic), how it looks (studio_page), the command."""
