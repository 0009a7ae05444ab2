"""What cells do with numpy most, run before an image is saved. Leaves no variables."""

exec(r"""
import numpy as np

a = np.arange(12).reshape(3, 4)
b = np.array([1.5, 2.5, 3.5])
c = np.zeros((2, 2)) + np.ones((2, 2)) * 2
str((a.sum(), a.mean(axis=0), b.std(), b @ b, c.dot(c), a[a > 3], a.T[:2], np.sqrt(b), np.concatenate([b, b])))
repr((np.linspace(0, 1, 5), np.where(b > 2, 1, 0), np.unique(a), np.argsort(-b), np.linalg.norm(b), a.tolist()))
""", {})
