"""What a run measures on responses of the reference policy before its first iteration."""
