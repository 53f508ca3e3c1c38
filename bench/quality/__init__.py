"""Quality of small models beside their rivals, by training them; see docs/quality.md."""
