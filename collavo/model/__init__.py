"""CoLLaVO's model: LLaVA whose decoder layers carry the crayon and two adapters."""
