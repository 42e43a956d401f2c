use super::*;

fn answer(index: &str, group: &str, metric: &str, prediction: &str, score: f64) -> Answer {
    Answer {
        index: index.into(),
        group: group.into(),
        metric: metric.into(),
        prediction: prediction.into(),
        score,
        reply: None,
        unjudged: false,
        truth: None,
        unit: None,
        stratum: None,
    }
}

fn scores(answers: Vec<Answer>) -> ModelScores {
    summarise("m".into(), "b".into(), answers, EvalTiming::default())
}

#[test]
fn group_scores_and_both_means_equal_values_computed_by_hand() {
    let rows = [("1", "x", 1.0), ("2", "x", 0.0), ("3", "x", 0.0), ("4", "x", 1.0), ("5", "y", 1.0)];
    let scores =
        scores(rows.iter().map(|(index, group, score)| answer(index, group, "exact_match", "", *score)).collect());
    let groups: Vec<(&str, f64)> = scores.groups.iter().map(|group| (group.group.as_str(), group.score)).collect();
    assert_eq!(groups, [("x", 0.5), ("y", 1.0)]);
    assert_eq!(scores.mean_of_groups, 0.75);
    assert_eq!(scores.mean_of_questions, 0.6);
}

#[test]
fn retention_is_computed_by_group_and_overall() {
    let dense = scores((0..40).map(|i| answer(&i.to_string(), if i < 30 { "x" } else { "y" }, "m", "", 1.0)).collect());
    let pruned = scores(
        (0..40)
            .map(|i| {
                answer(
                    &i.to_string(),
                    if i < 30 { "x" } else { "y" },
                    "m",
                    "",
                    f64::from(u8::from(i % 2 == 0 && i < 30)),
                )
            })
            .collect(),
    );
    let kept = compare(&pruned, &dense, 3).expect("retention");
    assert_eq!(kept.groups[0].retention.expect("x").ratio, 0.5);
    assert_eq!(kept.groups[1].retention.expect("y").ratio, 0.0);
    assert_eq!(kept.mean_of_groups.expect("mean").ratio, 0.25);
    assert_eq!(kept.mean_of_questions.expect("mean").ratio, 0.375);
    let interval = kept.mean_of_groups.expect("mean");
    assert!(interval.low < 0.25 && interval.high > 0.25 && interval.high < 0.36, "{interval:?}");
    assert_eq!(compare(&pruned, &dense, 3).expect("again"), kept);
    assert_eq!(kept.score, kept.mean_of_groups);
}

#[test]
fn scores_of_different_questions_are_not_compared() {
    let a = scores(vec![answer("1", "x", "m", "", 1.0)]);
    let b = scores(vec![answer("2", "x", "m", "", 1.0)]);
    compare(&a, &a, 1).expect("the same questions");
    let error = compare(&a, &b, 1).expect_err("other questions").to_string();
    assert!(error.contains("model and baseline did not answer the same questions"), "{error}");
}
