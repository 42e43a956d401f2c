//! Charts as SVG. Series differ by colour, by dashes and by the shape of their marks.

use std::fmt::Write;

use super::html::escaped;

/// Style sheet of charts, with the colours of the page.
pub const CHART_STYLE: &str = include_str!("charts.css");

/// Size of a chart, and of the space around its plot.
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 290.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 46.0;
/// Dashes of the series, in turn.
const DASHES: &[&str] = &["none", "7 4", "2 3", "10 3 2 3", "4 4", "1 4"];
/// Series that can be told apart.
pub const SERIES: usize = DASHES.len();

/// Name and description of a chart, which screen readers read.
pub struct Caption<'a> {
    /// What it shows.
    pub title: &'a str,
    /// What is to be seen.
    pub description: String,
    /// Name of the horizontal axis.
    pub x: &'a str,
    /// Name of the vertical axis.
    pub y: &'a str,
}

/// A line through points, in order of `x`.
pub struct Line {
    /// Name in the legend.
    pub name: String,
    /// Points.
    pub points: Vec<(f64, f64)>,
    /// Values of `x` whose points are ringed.
    pub ringed: Vec<f64>,
}

/// A value with the ends of its interval.
pub struct ErrorBar {
    /// The value.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// A step between ticks (1, 2 or 5 times a power of ten) that gives at most about five.
fn step(span: f64) -> f64 {
    let raw = span.max(f64::MIN_POSITIVE) / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= raw * 0.999).unwrap_or(raw)
}

/// A linear axis over values, widened to whole ticks.
struct Axis {
    low: f64,
    high: f64,
    step: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let finite = values.filter(|value| value.is_finite());
        let (low, high) = finite.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if low > high { (0.0, 1.0) } else { (low, high) };
        let (low, high) = if high - low < 1e-12 { (low - 0.5, high + 0.5) } else { (low, high) };
        let step = step(high - low);
        Axis { low: (low / step).floor() * step, high: (high / step).ceil() * step, step, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        let count = ((self.high - self.low) / self.step).round() as usize;
        (0..=count).map(|tick| self.low + tick as f64 * self.step)
    }

    fn text(&self, value: f64) -> String {
        let digits = (-self.step.log10().floor()).clamp(0.0, 8.0) as usize;
        let text = format!("{value:.digits$}");
        if text.trim_start_matches('-').chars().all(|c| c == '0' || c == '.') {
            format!("{:.digits$}", 0.0)
        } else {
            text
        }
    }
}

fn open(caption: &Caption, height: f64) -> String {
    open_svg(height) + &described(caption)
}

fn open_svg(height: f64) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n")
}

fn described(caption: &Caption) -> String {
    format!("<title>{}</title>\n<desc>{}</desc>\n", escaped(caption.title), escaped(&caption.description))
}

/// The axes with their ticks and names.
fn axes(caption: &Caption, x: &Axis, y: &Axis) -> String {
    let mut text = String::new();
    for tick in y.ticks() {
        let (at, label) = (y.at(tick), y.text(tick));
        let _ = writeln!(
            text,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" /><text class=\"soft\" x=\"{:.1}\" \
             y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0
        );
    }
    for tick in x.ticks() {
        let (at, label) = (x.at(tick), x.text(tick));
        let _ = writeln!(
            text,
            "<text class=\"soft\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            HEIGHT - BOTTOM + 17.0
        );
    }
    let _ = writeln!(
        text,
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{0:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" />\n<text x=\"{2:.1}\" y=\"{3:.1}\" \
         text-anchor=\"middle\">{4}</text>\n<text transform=\"translate(14 {5:.1}) rotate(-90)\" \
         text-anchor=\"middle\">{6}</text>",
        WIDTH - RIGHT,
        HEIGHT - BOTTOM,
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 8.0,
        escaped(caption.x),
        (TOP + HEIGHT - BOTTOM) / 2.0,
        escaped(caption.y)
    );
    text
}

/// The mark of a series at a place: circle, square, triangle, diamond, cross, bar.
fn mark(series: usize, x: f64, y: f64) -> String {
    let class = format!("class=\"mark s{}\"", series % SERIES);
    match series % SERIES {
        0 => format!("<circle {class} cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" />"),
        1 => format!("<rect {class} x=\"{:.1}\" y=\"{:.1}\" width=\"7\" height=\"7\" />", x - 3.5, y - 3.5),
        2 => format!("<path {class} d=\"M{x:.1} {:.1} l4.5 8 h-9 z\" />", y - 5.0),
        3 => format!("<path {class} d=\"M{x:.1} {:.1} l5 5 l-5 5 l-5 -5 z\" />", y - 5.0),
        4 => format!("<path {class} d=\"M{:.1} {:.1} l8 8 m0 -8 l-8 8\" />", x - 4.0, y - 4.0),
        _ => format!("<path {class} d=\"M{x:.1} {:.1} v10\" />", y - 5.0),
    }
}

/// Names of the series with their marks.
fn legend(names: &[&str]) -> String {
    let entry = |(number, name): (usize, &&str)| {
        let dashes = DASHES[number % SERIES];
        format!(
            "<li><svg viewBox=\"0 0 48 16\" aria-hidden=\"true\"><line class=\"line s{}\" stroke-dasharray=\"{dashes}\" x1=\"2\" \
             x2=\"46\" y1=\"8\" y2=\"8\" />{}</svg>{}</li>",
            number % SERIES,
            mark(number, 24.0, 8.0),
            escaped(name)
        )
    };
    format!("<ul class=\"legend\">{}</ul>\n", names.iter().enumerate().map(entry).collect::<String>())
}

/// A chart with axes and named series.
pub struct Chart {
    /// Its title and description.
    caption: String,
    /// What is inside of the plot, and the axes.
    drawing: String,
    /// Names of its series.
    series: Vec<String>,
}

impl Chart {
    /// As a part of the page, with a legend below.
    pub fn figure(&self) -> String {
        let names: Vec<&str> = self.series.iter().map(String::as_str).collect();
        let (head, legend) = (open_svg(HEIGHT) + &self.caption, legend(&names));
        format!("<figure>\n{head}{}</svg>\n{legend}</figure>\n", self.drawing)
    }

    /// As an SVG file of its own, with its style and the names of the series below the plot.
    pub fn file(&self) -> String {
        const ROW: f64 = 20.0;
        let height = HEIGHT + 8.0 + ROW * self.series.len() as f64;
        let mut names = String::new();
        for (number, name) in self.series.iter().enumerate() {
            let top = HEIGHT + 8.0 + ROW * number as f64;
            let (left, mark) = (LEFT + 14.0, mark(number, LEFT, top));
            let _ = writeln!(names, "{mark}<text x=\"{left:.1}\" y=\"{:.1}\">{}</text>", top + 4.5, escaped(name));
        }
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
             role=\"img\">\n{}<style>\n{CHART_STYLE}</style>\n<rect width=\"100%\" height=\"100%\" style=\"fill: var(--paper)\" />\n\
             {}{names}</svg>\n",
            self.caption, self.drawing,
        )
    }
}

/// Lines over a common axis, with marks unless there are many points.
pub fn lines(caption: &Caption, lines: &[Line]) -> Chart {
    const MOST_MARKS: usize = 40;
    let all = || lines.iter().flat_map(|line| line.points.iter());
    let x = Axis::over(all().map(|point| point.0), LEFT, WIDTH - RIGHT);
    let y = Axis::over(all().map(|point| point.1), HEIGHT - BOTTOM, TOP);
    let mut text = axes(caption, &x, &y);
    for (number, line) in lines.iter().enumerate() {
        let points: Vec<(f64, f64)> = line.points.iter().map(|point| (x.at(point.0), y.at(point.1))).collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            text,
            "<polyline class=\"line s{}\" stroke-dasharray=\"{}\" points=\"{}\" />",
            number % SERIES,
            DASHES[number % SERIES],
            path.join(" ")
        );
        if points.len() <= MOST_MARKS {
            text.extend(points.iter().map(|(x, y)| mark(number, *x, *y)));
        }
        for (_, at) in line.points.iter().zip(&points).filter(|(point, _)| line.ringed.contains(&point.0)) {
            let _ = write!(text, "<circle class=\"ring\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"8\" />", at.0, at.1);
        }
        text.push('\n');
    }
    Chart { caption: described(caption), drawing: text, series: lines.iter().map(|line| line.name.clone()).collect() }
}

/// Rows of intervals, one mark for each series, with a line at `reference`.
pub fn intervals(
    caption: &Caption,
    rows: &[(String, Vec<Option<ErrorBar>>)],
    series: &[&str],
    reference: f64,
) -> String {
    const ROW: f64 = 48.0;
    let height = TOP + ROW * rows.len() as f64 + BOTTOM;
    let ends = rows.iter().flat_map(|row| row.1.iter().flatten()).flat_map(|value| [value.low, value.high]);
    let x = Axis::over(ends.chain([reference]), 28.0, WIDTH - 28.0);
    let mut text = open(caption, height);
    for tick in x.ticks() {
        let (at, label) = (x.at(tick), x.text(tick));
        let _ = writeln!(
            text,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{0:.1}\" /><text class=\"soft\" x=\"{at:.1}\" \
             y=\"{1:.1}\" text-anchor=\"middle\">{label}</text>",
            height - BOTTOM,
            height - BOTTOM + 17.0
        );
    }
    let at = x.at(reference);
    let _ = writeln!(
        text,
        "<line class=\"ring\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{:.1}\" />\n<text x=\"{:.1}\" y=\"{:.1}\" \
         text-anchor=\"middle\">{}</text>",
        height - BOTTOM,
        WIDTH / 2.0,
        height - 8.0,
        escaped(caption.x)
    );
    for (number, (name, values)) in rows.iter().enumerate() {
        let top = TOP + ROW * number as f64;
        let _ = writeln!(text, "<text x=\"12\" y=\"{:.1}\">{}</text>", top + 13.0, escaped(name));
        for (place, value) in values.iter().enumerate() {
            let Some(value) = value else { continue };
            let y = top + 25.0 + 11.0 * place as f64;
            let _ = writeln!(
                text,
                "<line class=\"line s{}\" stroke-dasharray=\"{}\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" />{}",
                place % SERIES,
                DASHES[place % SERIES],
                x.at(value.low),
                x.at(value.high),
                mark(place, x.at(value.value), y)
            );
        }
    }
    format!("<figure>\n{text}</svg>\n{}</figure>\n", legend(series))
}

/// A named point; `on_front` points are ringed and joined.
pub struct ChartPoint {
    /// Index of its series.
    pub series: usize,
    /// Its place.
    pub at: (f64, f64),
    /// True when no other point is better in one and as good in the other direction.
    pub on_front: bool,
}

/// Points in two directions in which more is better, and the front of the best.
pub fn front(caption: &Caption, points: &[ChartPoint], series: &[String]) -> Chart {
    // Space around the outermost points, for their rings.
    let padded = |values: Vec<f64>| {
        let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
        let space = 0.05 * (high - low);
        [low - space, high + space].into_iter()
    };
    let x = Axis::over(padded(points.iter().map(|point| point.at.0).collect()), LEFT, WIDTH - RIGHT);
    let y = Axis::over(padded(points.iter().map(|point| point.at.1).collect()), HEIGHT - BOTTOM, TOP);
    let mut text = axes(caption, &x, &y);
    let mut best: Vec<(f64, f64)> = points.iter().filter(|point| point.on_front).map(|point| point.at).collect();
    best.sort_by(|a, b| a.0.total_cmp(&b.0));
    let path: Vec<String> = best.iter().map(|at| format!("{:.1},{:.1}", x.at(at.0), y.at(at.1))).collect();
    let _ = writeln!(text, "<polyline class=\"line axis\" stroke-dasharray=\"3 3\" points=\"{}\" />", path.join(" "));
    for point in points {
        let (left, top) = (x.at(point.at.0), y.at(point.at.1));
        text.push_str(&mark(point.series, left, top));
        if point.on_front {
            let _ = write!(text, "<circle class=\"ring\" cx=\"{left:.1}\" cy=\"{top:.1}\" r=\"8\" />");
        }
        text.push('\n');
    }
    Chart { caption: described(caption), drawing: text, series: series.to_vec() }
}

/// Bars from 0, each of several parts. Parts differ by colour and by the pattern of their edge; their values stand in the table.
pub fn bars(caption: &Caption, rows: &[(String, Vec<f64>)], parts: &[&str], unit: &str) -> String {
    const ROW: f64 = 44.0;
    let height = TOP + ROW * rows.len() as f64 + BOTTOM;
    let totals = rows.iter().map(|row| row.1.iter().sum::<f64>());
    let x = Axis::over(totals.chain([0.0]), 12.0, WIDTH - 100.0);
    let mut text = open(caption, height);
    for (number, (name, values)) in rows.iter().enumerate() {
        let top = TOP + ROW * number as f64;
        let _ = writeln!(text, "<text x=\"12\" y=\"{:.1}\">{}</text>", top + 13.0, escaped(name));
        let mut begin = 0.0;
        for (place, value) in values.iter().enumerate() {
            let (left, right) = (x.at(begin), x.at(begin + value));
            let _ = writeln!(
                text,
                "<rect class=\"f{0} s{0}\" fill-opacity=\"{1}\" stroke-dasharray=\"{2}\" stroke-width=\"1.5\" x=\"{left:.1}\" \
                 y=\"{3:.1}\" width=\"{4:.1}\" height=\"15\" />",
                place % SERIES,
                [0.85, 0.45, 0.15][place % 3],
                DASHES[place % SERIES],
                top + 19.0,
                (right - left).max(0.0)
            );
            begin += value;
        }
        let total: f64 = values.iter().sum();
        let shown = if total >= 100.0 { format!("{total:.0}") } else { format!("{total:.2}") };
        let _ = writeln!(text, "<text x=\"{:.1}\" y=\"{:.1}\">{shown} {unit}</text>", x.at(total) + 6.0, top + 31.0);
    }
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        WIDTH / 2.0,
        height - 14.0,
        escaped(caption.x)
    );
    let legend = if parts.len() > 1 { bar_legend(parts) } else { String::new() };
    format!("<figure>\n{text}</svg>\n{legend}</figure>\n")
}

fn bar_legend(parts: &[&str]) -> String {
    let entry = |(number, name): (usize, &&str)| {
        format!(
            "<li><svg viewBox=\"0 0 48 16\" aria-hidden=\"true\"><rect class=\"f{0} s{0}\" fill-opacity=\"{1}\" \
             stroke-dasharray=\"{2}\" stroke-width=\"1.5\" x=\"8\" y=\"2\" width=\"32\" height=\"12\" /></svg>{3}</li>",
            number % SERIES,
            [0.85, 0.45, 0.15][number % 3],
            DASHES[number % SERIES],
            escaped(name)
        )
    };
    format!("<ul class=\"legend\">{}</ul>\n", parts.iter().enumerate().map(entry).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        for (values, want) in [
            (vec![0.4, 0.98], vec!["0.4", "0.6", "0.8", "1.0"]),
            (vec![0.0, 15.0], vec!["0", "5", "10", "15"]),
            (vec![3.0, 3.0], vec!["2.4", "2.6", "2.8", "3.0", "3.2", "3.4", "3.6"]),
            (vec![], vec!["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
            (vec![f64::NAN, 1.0, 2.0], vec!["1.0", "1.2", "1.4", "1.6", "1.8", "2.0"]),
        ] {
            let axis = Axis::over(values.clone().into_iter(), 0.0, 100.0);
            let ticks: Vec<String> = axis.ticks().map(|tick| axis.text(tick)).collect();
            assert_eq!(ticks, want, "{values:?}");
            assert!(
                values.iter().filter(|value| value.is_finite()).all(|value| (0.0..=100.0).contains(&axis.at(*value)))
            );
        }
    }

    #[test]
    fn a_chart_in_a_file_of_its_own_has_its_style_and_the_names_of_its_series() {
        let caption = Caption { title: "T", description: "d".into(), x: "x", y: "y" };
        let point = |series, at, on_front| ChartPoint { series, at, on_front };
        let points = [point(0, (1.0, 99.0), true), point(1, (1.5, 90.0), true), point(1, (1.2, 80.0), false)];
        let text = front(&caption, &points, &["dense".to_string(), "a <b>".to_string()]).file();
        assert!(text.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"") && text.ends_with("</svg>\n"), "{text}");
        assert_eq!((text.matches("<svg").count(), text.matches("class=\"ring\"").count()), (1, 2));
        assert!(text.contains("<style>") && text.contains(">a &lt;b&gt;</text>") && !text.contains("<ul"), "{text}");
        // Three points and two names.
        assert_eq!(text.matches("class=\"mark").count(), 5);
    }

    #[test]
    fn charts_have_a_title_a_description_and_a_legend_that_needs_no_colour() {
        let caption = Caption { title: "T <1>", description: "d & e".into(), x: "x", y: "y" };
        let line = |name: &str| Line { name: name.into(), points: vec![(0.0, 1.0), (1.0, 2.0)], ringed: vec![1.0] };
        let text = lines(&caption, &[line("a"), line("b")]).figure();
        assert!(text.contains("<title>T &lt;1&gt;</title>\n<desc>d &amp; e</desc>"), "{text}");
        assert_eq!(text.matches("class=\"ring\"").count(), 2);
        assert!(text.contains("stroke-dasharray=\"none\"") && text.contains("stroke-dasharray=\"7 4\""));
        assert!(text.contains("<circle class=\"mark s0\"") && text.contains("<rect class=\"mark s1\""));
    }
}
