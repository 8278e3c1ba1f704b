"""Writing a sweep for images that nothing was tuned on: what to do with them in how many hours.

``images`` says what they are, ``pace`` and ``crew`` measure how fast workers are, ``programme`` has
the sizes of a sweep by the effort that it makes, ``forecast`` how long one takes, ``choice`` takes
the largest that fits; ``page`` writes it down and ``text`` tells of it.
"""
