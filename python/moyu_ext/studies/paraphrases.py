"""Pairs of sentences that say the same in other words, simple enough for small story models."""

PAIRS: tuple[tuple[str, str], ...] = (
    (
        "The little girl cried because she lost her doll.",
        "A small child was in tears, for her toy had gone missing.",
    ),
    ("The dog ran after the ball in the park.", "On the green grass a puppy chased a round toy."),
    (
        "Mom cooked a big dinner for the family.",
        "A mother made plenty of food for everyone at home.",
    ),
    (
        "It rained all day, so they stayed inside.",
        "Because of the wet weather the children did not go out.",
    ),
    ("The boy was scared of the dark.", "At night, without a light, a young man felt very afraid."),
    (
        "She gave her friend a present for her birthday.",
        "For the party he brought a gift to the one who turned five.",
    ),
    ("The cat slept on the warm bed.", "A kitten took a nap on top of a cozy blanket."),
    (
        "They built a tall tower with blocks.",
        "Some kids stacked wooden cubes until the pile was very high.",
    ),
    ("The bird flew over the big trees.", "High above the forest a robin spread its wings."),
    ("He was hungry and ate three apples.", "Wanting food, Tom had some fruit, one after another."),
    (
        "The teacher read a story to the class.",
        "At school, pupils listened while a tale was told from a book.",
    ),
    ("The fish swam in the cold river.", "In chilly water a trout moved along the stream."),
    (
        "Ben broke the vase and said sorry.",
        "The glass fell to pieces, and the boy told them he was ashamed.",
    ),
    (
        "Grandma told them to share the cookies.",
        "The old lady asked that the sweets be split between both.",
    ),
    (
        "The sun was bright and the sky was blue.",
        "It was a clear, shiny morning without any clouds.",
    ),
    (
        "Lily found a shiny coin under the tree.",
        "Something made of gold lay on the ground, and a girl picked it up.",
    ),
    (
        "The car would not start, so dad walked to work.",
        "Since the engine was dead, my father went to his job on foot.",
    ),
    (
        "They were best friends and played every day.",
        "The two pals always had fun with each other.",
    ),
    (
        "The monster was kind and helped the lost boy.",
        "A nice, furry beast showed a child the way home.",
    ),
    (
        "She washed her hands before lunch.",
        "With soap and water Anna got clean and then sat down to eat.",
    ),
    (
        "The king lived in a castle on the hill.",
        "High up, inside stone walls, a ruler had his house.",
    ),
    (
        "He fell off his bike and hurt his knee.",
        "Riding too fast, Sam tumbled down and his leg was bleeding.",
    ),
    (
        "The baby laughed at the funny clown.",
        "An infant giggled as the man with a red nose did his tricks.",
    ),
    (
        "They planted seeds and watched the flowers grow.",
        "In the garden, what was put in the soil became roses.",
    ),
)
