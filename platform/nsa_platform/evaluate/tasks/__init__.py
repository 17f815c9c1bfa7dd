"""Tasks with prompts, answers and exact scores, run by one harness."""
