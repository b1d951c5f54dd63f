"""A story that keeps to every rule, for tests of what story models are measured by."""

STORY = (
    "Once upon a time, there was a dog named Rex who lived with Lily. One day, Lily gave him a red ball. "
    '"Look, it is for you!" she said. The dog ran far with it and came back with mud on his nose. '
    "Lily laughed and cleaned his face with a towel. They sat under the old tree until the sun was low, "
    "and the dog kept the ball close all night. When it was morning, Rex was up first and ran to wake up Lily."
)
