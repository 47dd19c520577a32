"""Index of a training set: embedded once, then searched for influential images in milliseconds per query.

Fast Data Attribution, section 4.3. From Python, with a trained ranker and features of all training images:

    ranker, names = load_ranker(Path("weights/emoji_1k_ranker"))
    features = [image_features(images, encoders[name], store) for name in names]
    training = {"images": images.fingerprint}
    embeddings = embed_training_set(
        ranker, names=names, features=features, training=training, store=store, runner=runner
    )
    folder = build_index(
        store,
        runner=runner,
        rows=rows_of(images),
        embeddings=embeddings,
        training=training,
        factory="IVF4096,PQ64",
        search="nprobe=32",
    )

    index = Index(folder, ranker=ranker_identity(ranker, names))
    queries = Embeddings(embed(ranker, query_features, names), ranker_identity(ranker, names))
    for found in index.search(queries, k=100):
        print(found.images[0], found.scores[0], found.rows["license"][0])

    index.remove(["an/image/to/remove"])  # also excluded from later batches and shards, until it is restored
    index.add(rows_of(more), more_embeddings)
    index.merge(another_folder)  # built with like=folder

`wherefrom.attributors.LearnedRanker` does all of this for a folder of images.
"""

from wherefrom.index.build import build_index
from wherefrom.index.catalog import catalog_rows, rows_of
from wherefrom.index.embeddings import Embeddings, embed, embed_training_set, ranker_identity
from wherefrom.index.index import Index, SearchResult

__all__ = [
    "Embeddings",
    "Index",
    "SearchResult",
    "build_index",
    "catalog_rows",
    "embed",
    "embed_training_set",
    "ranker_identity",
    "rows_of",
]
