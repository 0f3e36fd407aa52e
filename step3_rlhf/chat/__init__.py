"""Talk to policies, several side by side, and see how often each gives which answer.

scripts/chat.sh runs `python -m step3_rlhf.chat`.
"""
