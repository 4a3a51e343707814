import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankgrpo.distill.cache import pack_rows, unpack_rows
from rankgrpo.distill.embed import Tfidf, products, weighted_rows, words


def dense_oracle(documents, texts):
    """TF-IDF from its definition, one text and one word at a time."""
    vocabulary = sorted({word for document in documents for word in words(document)})
    df = {word: sum(word in words(document) for document in documents) for word in vocabulary}
    kept = [word for word in vocabulary if 2 <= df[word] <= max(0.2 * len(documents), 2)]
    rows = np.zeros((len(texts), len(kept)))
    for row, text in enumerate(texts):
        for column, word in enumerate(kept):
            if count := words(text).count(word):
                idf = math.log((1 + len(documents)) / (1 + df[word])) + 1
                rows[row, column] = (1 + math.log(count)) * idf
        rows[row] /= np.linalg.norm(rows[row]) or 1
    return rows


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(alphabet="abcde ", min_size=1, max_size=30), min_size=4, max_size=20))
def test_tfidf_is_its_definition(documents):
    documents = [*documents, "zz yy", "zz yy yy"]
    rows_ND = Tfidf.fit(documents).encode([*documents, "", "zz unknown"]).to_dense()
    np.testing.assert_allclose(rows_ND, dense_oracle(documents, [*documents, "", "zz unknown"]), atol=1e-6)


def test_words_that_say_nothing_are_left_out():
    documents = ["the heist in la", "the heist in town", "the dog", "the cat", "the end", "the start"]
    model = Tfidf.fit(documents, max_df_frac=0.5)
    assert sorted(model.column) == ["heist", "in"]  # "the" is everywhere, the others in one text only
    with pytest.raises(ValueError, match="no word is in 2 or more of the 1 item texts"):
        Tfidf.fit(["alone"])


def test_words_are_folded():
    assert words("Don’t  LOOK_back: 1995!") == ["don't", "look", "back", "1995"]


def test_products_of_sparse_rows_are_those_of_dense_ones():
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(5, 4, generator=generator) * (torch.rand(5, 4, generator=generator) > 0.5)
    query_BD, weight_BN = torch.randn(3, 4, generator=generator), torch.randn(3, 5, generator=generator)
    torch.testing.assert_close(products(query_BD, rows_ND.to_sparse()), query_BD @ rows_ND.T)
    torch.testing.assert_close(products(query_BD, rows_ND), query_BD @ rows_ND.T)
    torch.testing.assert_close(weighted_rows(weight_BN, rows_ND.to_sparse()), weight_BN @ rows_ND)
    for rows in (rows_ND, rows_ND.to_sparse().coalesce()):
        again = unpack_rows("x", pack_rows("x", rows))
        assert again.is_sparse == rows.is_sparse and torch.equal(again.to_dense(), rows_ND)
