"""The search for influential images: a training set embedded once, then milliseconds a query.

Fast Data Attribution, section 4.3. From Python, with a trained ranker and features of all training images:

    ranker, names = load_ranker(Path("weights/emoji_1k_ranker"))
    features = [picture_features(images, encoders[name], store) for name in names]
    training = {"images": pictures.fingerprint}
    embeddings = embed_training_set(ranker, names, features, training, store, runner)
    folder = build_index(store, runner, rows_of(images), embeddings, training, "IVF4096,PQ64", "nprobe=32")

    index = Index(folder, ranker_identity(ranker, names))
    queries = Embeddings(embed(ranker, query_features, names), ranker_identity(ranker, names))
    for hits in index.search(queries, k=100):
        print(hits.images[0], hits.scores[0], hits.rows["license"][0])

    index.remove(["an/image/to/take/down"])  # stays away from later batches and shards, until it is restored
    index.add(rows_of(more), more_embeddings)
    index.merge(another_folder)  # built with like=folder

`wherefrom.attributors.LearnedRanker` does all of this for a folder of images.
"""

from wherefrom.index.build import build_index
from wherefrom.index.catalog import catalog_rows, rows_of
from wherefrom.index.embeddings import Embeddings, embed, embed_training_set, ranker_identity
from wherefrom.index.index import Hits, Index

__all__ = [
    "Embeddings",
    "Hits",
    "Index",
    "build_index",
    "catalog_rows",
    "embed",
    "embed_training_set",
    "ranker_identity",
    "rows_of",
]
