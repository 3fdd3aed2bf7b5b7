"""After the run: timings as data, and the tables, timelines and files made from them."""
