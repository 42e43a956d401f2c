//! Command-line options of data sets, and the columns that benchmarks may have.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::cli::{interlace, stderr, stdout};

fn fixture(path: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path).display().to_string()
}

/// Runs `interlace --json score` on a data set in the folder; returns the scores and stderr.
fn score(folder: &Path, data: &str, more: &[&str]) -> Result<(Value, String), String> {
    let model = fixture("model");
    let arguments = ["--json", "score", &model, "--data", data, "-o", "scores.json", "--quiet"];
    let output = interlace(folder, &[&arguments[..], more].concat());
    match output.status.code() {
        Some(0) => Ok((
            serde_json::from_str(&fs::read_to_string(folder.join("scores.json")).unwrap()).unwrap(),
            stderr(&output),
        )),
        code => {
            assert_eq!(code, Some(2), "{}{}", stdout(&output), stderr(&output));
            assert!(!folder.join("out.json").exists());
            Err(stderr(&output))
        }
    }
}

/// The names of the samples, without "(id `..`)" around an id.
fn ids(scores: &Value) -> Vec<String> {
    let name = |sample: &Value| {
        let id = sample["id"].as_str().expect("an id");
        id.split_once("(id `").map_or(id, |(_, id)| id.trim_end_matches("`)")).to_string()
    };
    scores["samples"].as_array().expect("samples").iter().map(name).collect()
}

fn row(number: usize, picture: Option<&str>) -> String {
    let mut row = json!({
        "id": format!("n{number}"),
        "relevance_min": number % 5,
        "conversations": [
            {"from": "human", "value": format!("Is it {number}?")},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "Is it red?"},
            {"from": "gpt", "value": "no"},
        ],
    });
    if let Some(picture) = picture {
        row["image"] = json!(picture);
    }
    row.to_string()
}

#[test]
fn unreadable_rows_are_counted_and_listed_or_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, broken: &[usize]| {
        let row = |number| row(number, broken.contains(&number).then_some("missing.png"));
        fs::write(folder.path().join(name), (0..24).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    };
    let all = ["--fraction", "1"];
    write("one.jsonl", &[7]);
    let (scores, warned) = score(folder.path(), "one.jsonl", &all).unwrap();
    assert_eq!(ids(&scores).len(), 23);
    assert_eq!(scores["left_out"]["unreadable"], 1);
    let reason = scores["left_out"]["reasons"][0].as_str().unwrap();
    assert!(reason.contains("missing.png") && reason.contains("row 7 of `one.jsonl`"), "{reason}");
    assert!(warned.contains("1 unreadable") && warned.contains("missing.png"), "{warned}");

    let error = score(folder.path(), "one.jsonl", &["--fraction", "1", "--strict"]).unwrap_err();
    assert!(error.contains("missing.png") && error.contains("row 7 of `one.jsonl`"), "{error}");

    // 2 of 24 rows are more than 5%: an error with and without `--strict`.
    write("two.jsonl", &[7, 9]);
    let error = score(folder.path(), "two.jsonl", &all).unwrap_err();
    assert!(error.contains("more than 5% of 24 samples cannot be read"), "{error}");
    assert!(error.contains("row 7 of") && error.contains("row 9 of") && error.contains("repair the data"), "{error}");
}

#[test]
fn ratings_and_turns_select_the_samples() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("x.jsonl"), (0..10).map(|n| row(n, None)).collect::<Vec<_>>().join("\n")).unwrap();
    let run = |more: &[&str]| {
        let (scores, _) = score(folder.path(), "x.jsonl", &[&["--fraction", "1"][..], more].concat()).unwrap();
        let mut ids = ids(&scores);
        ids.sort();
        (ids, scores)
    };
    let (rated, scores) = run(&["--min-rating", "relevance_min=3"]);
    assert_eq!(rated, ["n3", "n4", "n8", "n9"]);
    assert_eq!(scores["settings"]["data"]["min_ratings"]["relevance_min"], 3.0);

    let (whole, scores) = run(&[]);
    assert_eq!((whole.len(), &scores["settings"]["data"]["turns"]), (10, &json!("conversation")));
    let (turns, scores) = run(&["--turns", "separate"]);
    assert_eq!((turns.len(), &scores["settings"]["data"]["turns"]), (20, &json!("separate")));
    // With separate turns, a turn does not contain the turn before it.
    let tokens = |scores: &Value, turn: &str| {
        let samples = scores["samples"].as_array().unwrap();
        samples.iter().find(|sample| sample["id"].as_str().unwrap().contains(turn)).unwrap()["tokens"].as_u64().unwrap()
    };
    let of_conversation = {
        let (scores, _) = score(folder.path(), "x.jsonl", &["--fraction", "1"]).unwrap();
        tokens(&scores, "(id `n1`)")
    };
    assert!(tokens(&scores, "turn 1 of row 1 ") < of_conversation);
}

#[test]
fn shards_in_a_folder_or_by_a_pattern_give_the_samples_of_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let rows: Vec<String> = (0..30).map(|number| row(number, None)).collect();
    fs::write(folder.path().join("whole.jsonl"), rows.join("\n")).unwrap();
    // The last rows are in the first file, in reverse order.
    for (shard, part) in rows.chunks(8).enumerate() {
        let part: Vec<&str> = part.iter().rev().map(String::as_str).collect();
        let path = folder.path().join(format!("shards/part-{}.jsonl", 9 - shard));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, part.join("\n")).unwrap();
    }
    for seed in ["1", "42"] {
        let drawn = |data: &str| {
            let (scores, _) = score(folder.path(), data, &["--samples", "5", "--seed", seed]).unwrap();
            let mut ids = ids(&scores);
            ids.sort();
            ids
        };
        let whole = drawn("whole.jsonl");
        assert_eq!(whole.len(), 5);
        assert_eq!(drawn("shards"), whole);
        assert_eq!(drawn("shards/part-*.jsonl"), whole);
    }
}

type Cells = Vec<(&'static str, String)>;

/// Writes a benchmark table in the format of VLMEvalKit.
fn benchmark(path: &Path, columns: &[&str], rows: &[Cells]) {
    let mut writer = csv::WriterBuilder::new().delimiter(b'\t').from_path(path).unwrap();
    writer.write_record(columns).unwrap();
    for row in rows {
        let cell = |name: &&str| row.iter().find(|(column, _)| column == name).map_or("", |(_, cell)| cell);
        writer.write_record(columns.iter().map(cell)).unwrap();
    }
    writer.flush().unwrap();
}

/// Question 1 of the small benchmark and its picture: is `best`, `week`, `life` or `road` written? The answer is
/// `life`.
fn written_word() -> (String, String) {
    let mut reader = csv::ReaderBuilder::new().delimiter(b'\t').from_path(fixture("data/bench-small.tsv")).unwrap();
    let rows: Vec<csv::StringRecord> = reader.records().take(2).map(Result::unwrap).collect();
    assert_eq!((&rows[0][7], &rows[1][5]), ("life", "life"));
    (rows[0][1].to_string(), rows[1][2].to_string())
}

fn eval(folder: &Path, data: &str, more: &[&str]) -> Value {
    let model = fixture("model");
    let arguments = ["eval", &model, "--data", data, "-o", "report.json", "--quiet", "--max-new-tokens", "4"];
    let output = interlace(folder, &[&arguments[..], more].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = serde_json::from_str(&fs::read_to_string(folder.join("report.json")).unwrap()).unwrap();
    fs::remove_file(folder.join("report.json")).unwrap();
    report
}

fn close(found: &Value, want: f64) -> bool {
    found.as_f64().is_some_and(|found| (found - want).abs() < 1e-9)
}

#[test]
fn every_form_of_picture_option_and_answer_columns_is_read() {
    use base64::Engine;

    let folder = tempfile::tempdir().unwrap();
    let (picture, question) = written_word();
    let bytes = base64::engine::general_purpose::STANDARD.decode(&picture).unwrap();
    fs::create_dir(folder.path().join("pictures")).unwrap();
    fs::write(folder.path().join("pictures/word.png"), bytes).unwrap();
    let (open, ask) = ("What word is written?".to_string(), question);
    let columns =
        ["index", "image", "image_path", "question", "A", "B", "C", "D", "answer", "category", "l2-category", "split"];
    let row = |index: &str, cells: &[(&'static str, &str)]| -> Cells {
        let own = cells.iter().map(|(name, cell)| (*name, cell.to_string()));
        own.chain([("index", index.to_string()), ("category", "words".into())]).collect()
    };
    let both = format!("['{picture}', '{picture}']");
    let choice = [("question", ask.as_str()), ("A", "best"), ("C", "life"), ("answer", "C")];
    let rows = [
        row("0", &[("image", &picture), ("question", &open), ("answer", "life"), ("l2-category", "x"), ("split", "a")]),
        // A picture taken from another row, and missing options between existing ones.
        row("1", &[&[("image", "0"), ("l2-category", "y"), ("split", "a")], &choice[..]].concat()),
        row("2", &[&[("image_path", "pictures/word.png"), ("l2-category", "y"), ("split", "b")], &choice[..]].concat()),
        row("3", &[("image", "0"), ("question", &open), ("answer", "['live', 'life']"), ("split", "b")]),
        row("4", &[("image", &both), ("question", "Are they the same?"), ("answer", "?"), ("category", "two")]),
        row("5", &[("question", "Without a picture?"), ("answer", "?")]),
    ];
    benchmark(&folder.path().join("quirks.tsv"), &columns, &rows);
    let report = eval(folder.path(), "quirks.tsv", &["--predictions", "kept.tsv"]);
    let model = &report["model"];
    assert_eq!((&report["rows_without_picture"], &model["questions"]), (&json!(1), &json!(5)), "{report}");
    let groups = |groups: &Value| -> Vec<(String, u64)> {
        let group =
            |group: &Value| (group["group"].as_str().unwrap().to_string(), group["questions"].as_u64().unwrap());
        groups.as_array().unwrap().iter().map(group).collect()
    };
    assert!(groups(&model["groups"]).contains(&("words".into(), 4)), "{model}");
    let words = model["groups"].as_array().unwrap().iter().find(|group| group["group"] == "words").unwrap();
    assert!(close(&words["score"], 1.0), "{model}");
    assert!(groups(&model["by_column"]["split"]).contains(&("b".into(), 2)), "{model}");
    assert!(groups(&model["by_column"]["l2-category"]).contains(&("y".into(), 2)), "{model}");
    // Two pictures take twice as many tokens as one.
    let kept = fs::read_to_string(folder.path().join("kept.tsv")).unwrap();
    assert!(kept.lines().count() == 6 && kept.contains("\"prediction\""), "{kept}");
}

#[test]
fn rotated_questions_are_scored_as_one_or_by_cycle() {
    let folder = tempfile::tempdir().unwrap();
    let (picture, question) = written_word();
    let words = ["best", "week", "life", "road"];
    // Options rotated by `by`; `answer` is the letter that is marked as right.
    let rotated = |index: usize, by: usize, answer: &str, column: &'static str, group: String| -> Cells {
        let option = |place: usize| words[(place + by) % 4].to_string();
        let mut row: Cells = vec![("index", index.to_string()), ("question", question.clone()), (column, group)];
        row.extend(["A", "B", "C", "D"].into_iter().enumerate().map(|(place, letter)| (letter, option(place))));
        row.extend([("answer", answer.to_string()), ("image", picture.clone()), ("category", "words".into())]);
        row
    };
    let columns = ["index", "g_index", "cycle_category", "image", "question", "A", "B", "C", "D", "answer", "category"];
    let million = 1_000_000;
    for (wrong, want) in [("A", 0.5), ("B", 1.0)] {
        // Both questions have two rotations. `life` is option B in the second one.
        let rows: Vec<Cells> = [(1, 0, "C"), (1, 1, "B"), (2, 0, "C"), (2, 1, wrong)]
            .map(|(of, by, answer)| rotated(of + by * million, by, answer, "g_index", of.to_string()))
            .to_vec();
        benchmark(&folder.path().join("MMBench_DEV_EN_V11.tsv"), &columns, &rows);
        let report = eval(folder.path(), "MMBench_DEV_EN_V11.tsv", &[]);
        assert!(close(&report["model"]["score"], want), "{report}");
        let rows: Vec<Cells> = [(1, 0, "C"), (2, 1, "B"), (3, 1, wrong)]
            .map(|(index, by, answer)| rotated(index, by, answer, "cycle_category", by.to_string()))
            .to_vec();
        benchmark(&folder.path().join("HRBench4K.tsv"), &columns, &rows);
        let report = eval(folder.path(), "HRBench4K.tsv", &[]);
        assert!(close(&report["model"]["score"], (1.0 + want) / 2.0), "{report}");
    }
}

/// `--turns separate` measures each turn without those before it: the losses are those of a file with a row for each turn.
#[test]
fn eval_reads_turns_as_finetune_does() {
    let folder = tempfile::tempdir().unwrap();
    let turn = |user: &str, answer: &str| {
        format!("{{\"from\": \"human\", \"value\": \"{user}\"}}, {{\"from\": \"gpt\", \"value\": \"{answer}\"}}")
    };
    let row = |turns: &[String]| format!("{{\"conversations\": [{}]}}", turns.join(", "));
    let turns = [turn("Is there a dog?", "yes"), turn("How many?", "two"), turn("What is written?", "west")];
    let (both, last) = turns.split_at(2);
    fs::write(folder.path().join("talks.jsonl"), [row(both), row(last)].join("\n")).unwrap();
    fs::write(folder.path().join("turns.jsonl"), turns.clone().map(|turn| row(&[turn])).join("\n")).unwrap();
    let sequences = |data: &str, more: &[&str]| eval(folder.path(), data, more)["model"]["sequences"].clone();
    let separate = sequences("talks.jsonl", &["--turns", "separate"]);
    assert_eq!(separate.as_array().unwrap().len(), 3);
    assert_eq!(separate, sequences("turns.jsonl", &[]));
    let whole = sequences("talks.jsonl", &["--turns", "conversation"]);
    assert_eq!(whole.as_array().unwrap().len(), 2);
    assert_eq!(whole, sequences("talks.jsonl", &[]));

    let bench = fixture("data/bench-small.tsv");
    let model = fixture("model");
    let refused = ["eval", &model, "--data", &bench, "--turns", "separate", "-o", "report.json", "--quiet"];
    let output = interlace(folder.path(), &refused);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("--turns is for conversations") && !folder.path().join("report.json").exists());
}
