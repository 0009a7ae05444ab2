# /// case
# title = "Classes and their instances live on: inheritance, properties, dataclasses, enums, metaclasses"
# contract = ["state"]
# plain = true
# ///

# %%
from dataclasses import dataclass, field
from enum import Enum

class Shape:
    count = 0

    def __init__(self, name):
        self.name = name
        Shape.count += 1

    @property
    def label(self):
        return f"<{self.name}>"

    @classmethod
    def made(cls):
        return cls.count

class Square(Shape):
    def __init__(self, side):
        super().__init__("square")
        self.side = side

    def __eq__(self, other):
        return isinstance(other, Square) and self.side == other.side

@dataclass(order=True)
class Point:
    x: int
    tags: list = field(default_factory=list)

class Colour(Enum):
    RED = 1

class Registry(type):
    known = []

    def __new__(cls, name, bases, names):
        made = super().__new__(cls, name, bases, names)
        cls.known.append(name)
        return made

class Plugin(metaclass=Registry):
    pass

# %%
one, other = Square(2), Square(2)
print(one == other, one.label, Square.made(), isinstance(one, Shape))
print(Point(1) < Point(2), Point(3, ["a"]), Colour(1), Registry.known)
print(type(one), Point.__module__)
#: stdout = """
#: True <square> 2 True
#: True Point(x=3, tags=['a']) Colour.RED ['Plugin']
#: <class '__main__.Square'> __main__
#: """

# %%
import pickle, copy
print(pickle.loads(pickle.dumps(one)) == one, copy.deepcopy(Point(1, [2])))
#: stdout = "True Point(x=1, tags=[2])\n"
