"""From files to tokens: readers of rows, shapes of records, chat templates, and which records come at which step."""
