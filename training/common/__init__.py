"""What all other rooms may use: checkpoint files, random numbers, processes, memory. It uses none of them."""
