"""The one place where text becomes ids and labels, in training and when a model is asked.

Called from outside: `opened.Opened`, which has a recipe's template, tokenizer, codec and tokens; `check.check`.
"""
