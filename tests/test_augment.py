from dataclasses import replace

from tiny_world import tiny_dataset

from rankgrpo.baselines.ease import EaseTeacher
from rankgrpo.data.dialogs import named_items
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.distill.augment import MAX_NAMED, short_demonstrations, similar_items
from rankgrpo.distill.demonstrations import make_demonstrations
from rankgrpo.parse import parse_list


def demonstrations(seed=0, num_variants=3):
    dataset = tiny_dataset()
    teacher = EaseTeacher.fit(dataset.train, dataset.catalog, num_folds=2)
    made = short_demonstrations(dataset.train, teacher, dataset.catalog, num_variants=num_variants, seed=seed)
    return dataset, teacher, made


def test_each_names_a_few_items_of_its_dialog_and_is_answered_by_the_teacher():
    dataset, teacher, made = demonstrations()
    similar, exchanged = similar_items(range(len(dataset.catalog)), teacher, 20), 0
    source = {sample.id: sample for sample in dataset.train}
    assert len(made) == 3 * len(dataset.train) == len({sample.id for sample in made})
    for sample in made:
        origin = source[sample.id.rpartition("+")[0]]
        named = named_items(sample, dataset.catalog)
        wanted = [dataset.catalog.lookup(*entry) for entry in origin.groundtruth]
        assert 1 <= len(named) <= MAX_NAMED
        items = {*named_items(origin, dataset.catalog), *wanted}
        assert set(named) <= items.union(*(similar[index] for index in items))
        exchanged += not set(named) <= items
        listed = [dataset.catalog.lookup(item.title, item.year) for item in parse_list(sample.completion)]
        assert len(listed) == len(set(listed)) == 20 and None not in listed
        assert not set(listed) & set(named)
    assert 0.3 < exchanged / len(made) < 0.95


def test_similar_items_are_the_teachers_list_for_one_title():
    dataset, teacher, _ = demonstrations()
    item = dataset.catalog.items[3]
    request = Sample("x", (Turn("user", f"I like {item.title} ({item.year})"),), (), ())
    assert similar_items([3], teacher, 20) == {3: teacher.rank_all([request])[0]}


def test_a_function_of_the_seed():
    assert demonstrations(1)[2] == demonstrations(1)[2] != demonstrations(2)[2]


def test_the_teacher_leaves_the_dialog_out():
    _, teacher, made = demonstrations()
    # Asked under an id it never saw, the teacher answers with the model of all dialogs.
    full = make_demonstrations([replace(sample, id="stranger") for sample in made], teacher)
    assert any(a.completion != b.completion for a, b in zip(made, full, strict=True))
    own = make_demonstrations([replace(sample, id=sample.id.rpartition("+")[0]) for sample in made], teacher)
    assert all(a.completion == b.completion for a, b in zip(made, own, strict=True))
