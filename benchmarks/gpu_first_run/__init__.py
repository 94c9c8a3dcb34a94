"""The first hour on a GPU machine, as one command: environment, parity with a CPU, the teacher's overlap, the cost of
each suspicion."""
