"""Files to records to rows, every one accounted for: reading, the template, which records are held out.

Called from outside: `read.read`, `read.load_python`, `template.load_template`, `split.Split`, `watch.Watch`.
"""
