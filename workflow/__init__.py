"""What the rules of the workflow compute: settings, resources, locks. No torch here."""
