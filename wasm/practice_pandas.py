"""What cells do with pandas most, run before an image is saved. Leaves no variables."""

exec(r"""
import io
import pandas as pd

df = pd.DataFrame({"a": [1, 2], "b": [0.5, None], "c": ["x", "y"]})
str((df["a"].sum(), df["a"].mean(), df["b"].max(), len(df), df.shape, list(df.columns), df.dtypes))
str(df), repr(df["c"]), str(df.head()), str(df.describe())
df["d"] = df["a"] * 2 + 1
df[df["a"] > 1], df.loc[0, "b"], df.iloc[0], df.sort_values("a"), df.fillna(0), df.isna().sum(), df["c"].str.upper()
str((df.groupby("c")["a"].sum(), df["c"].value_counts(), df["a"].tolist(), df.to_dict("records")))
str((pd.read_csv(io.StringIO("a,b\n1,2\n3,4\n")), pd.concat([df, df]), df.merge(df, on="a"), df["a"].apply(str)))
str((pd.to_datetime(["2024-01-31", "2024-02-29"]), pd.Series([1, 2, 3]).rolling(2).mean(), df.to_csv(index=False)))
""", {})
