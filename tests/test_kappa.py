"""Agreement of a judge with people: the interval on κ is that of statsmodels, and covers."""
import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from probunlearn.judged import Calibration, calibrate
from probunlearn.judges import kappa_interval

TABLES = [(40, 10, 5, 45), (3, 1, 20, 176), (120, 30, 30, 20), (1, 0, 0, 199), (10, 40, 45, 5)]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("alpha", [.01, .05])
def test_the_interval_is_that_of_statsmodels(table, alpha):
    caught, missed, alarms, passed = table
    theirs = cohens_kappa([[caught, missed], [alarms, passed]])
    low, high = kappa_interval(Calibration(*table), alpha).value
    assert (low + high) / 2 == pytest.approx(theirs.kappa, abs=1e-9) or high == 1 or low == -1
    reach = {.01: 2.5758293, .05: 1.9599640}[alpha] * theirs.std_kappa
    assert low == pytest.approx(max(-1, theirs.kappa - reach), abs=1e-7)
    assert high == pytest.approx(min(1, theirs.kappa + reach), abs=1e-7)


def test_it_is_narrower_with_more_labels_and_doesnt_care_who_is_whom():
    few, many = (np.ptp(kappa_interval(Calibration(*(k * np.array((8, 2, 1, 9)))), .05).value) for k in (5, 500))
    assert many == pytest.approx(few / 10)
    a, b = kappa_interval(Calibration(8, 2, 1, 9)).value, kappa_interval(Calibration(8, 1, 2, 9)).value
    assert a == pytest.approx(b)


def test_all_of_one_kind_says_nothing():
    assert np.isnan(kappa_interval(Calibration(20, 0, 0, 0)).value).all()


def test_two_hundred_labels_cover():
    "5,000 draws of 200 labels at α = .05: 5 % wrong, with a standard error of .3 points, if the normal law fits well."
    p, rng = np.array([.55, .1, .05, .3]), np.random.default_rng(0)
    chance = .65 * .6 + .35 * .4
    truth = (.85 - chance) / (1 - chance)
    ends = [kappa_interval(Calibration(*counts), .05).value for counts in rng.multinomial(200, p, 5000)]
    wrong = np.mean([not low <= truth <= high for low, high in ends])
    assert .03 < wrong < .075


def test_labels_and_counts_agree():
    rng = np.random.default_rng(1)
    truth, said = rng.integers(0, 2, 60), rng.random(60)
    found = calibrate(truth, said)
    assert np.mean(kappa_interval(found).value) == pytest.approx(found.kappa)
