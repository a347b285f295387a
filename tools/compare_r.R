# Computes R's values for the tables that compare_r.py wrote to a folder: Rscript compare_r.R FOLDER
suppressMessages({library(pROC); library(metafor); library(survival)})
folder <- commandArgs(trailingOnly = TRUE)[1]
out <- file(file.path(folder, "r.csv"), "w")
cat("table,name,value\n", file = out)
read <- function(name) read.csv(file.path(folder, paste0(name, ".csv")))
emit <- function(table, values) {
  cat(sprintf("%d,%s,%.17g\n", table, names(values), as.numeric(values)), file = out, sep = "")
}
tables <- function(name, compute) {
  data <- read(name)
  for (part in split(data, data$table)) emit(part$table[1], suppressWarnings(compute(part)))
}

tables("proportion", function(d) {
  wilson <- prop.test(d$k, d$n, correct = FALSE)$conf.int
  exact <- binom.test(d$k, d$n)
  rate <- binom.test(d$k, d$n, d$rate, alternative = "greater")
  c(wilson_low = wilson[1], wilson_high = wilson[2], exact_low = exact$conf.int[1], exact_high = exact$conf.int[2],
    above_rate_p = rate$p.value)
})

tables("paired", function(d) c(mcnemar_p = binom.test(d$b, d$b + d$c)$p.value))

tables("square", function(d) {
  test <- mcnemar.test(matrix(d$count, 3, byrow = TRUE), correct = FALSE)
  c(bowker = test$statistic[[1]], bowker_p = test$p.value)
})

tables("scores", function(d) {
  first <- roc(d$positive, d$first, levels = c(0, 1), direction = "<", quiet = TRUE)
  second <- roc(d$positive, d$second, levels = c(0, 1), direction = "<", quiet = TRUE)
  test <- roc.test(first, second, method = "delong", paired = TRUE)
  c(auroc = as.numeric(first$auc), auroc_error = sqrt(var(first, method = "delong")),
    auroc_z = test$statistic[[1]], auroc_p = test$p.value)
})

tables("classes", function(d) {
  probs <- as.matrix(d[, c("p0", "p1", "p2")])
  colnames(probs) <- c("0", "1", "2")
  c(hand_till = as.numeric(multiclass.roc(factor(d$label), probs)$auc))
})

tables("recalibration", function(d) {
  logit <- qlogis(d$prob)
  strict <- glm.control(epsilon = 1e-14, maxit = 100)
  large <- summary(glm(event ~ 1, offset = logit, family = binomial, data = d, control = strict))$coefficients
  fit <- glm(event ~ logit, family = binomial, data = d, control = strict)
  free <- summary(fit)$coefficients
  calibrated <- -2 * sum(ifelse(d$event == 1, log(d$prob), log(1 - d$prob)))
  isotonic <- isoreg(d$prob, d$event)
  fitted <- isotonic$yf
  sorted <- d$event[isotonic$ord]
  base <- mean(d$event)
  after <- mean((fitted - sorted)^2)
  c(large = large[1, 1], large_error = large[1, 2], intercept = free[1, 1], intercept_error = free[1, 2],
    slope = free[2, 1], slope_error = free[2, 2], recalibration_statistic = calibrated - fit$deviance,
    corp_reliability = mean((d$prob - d$event)^2) - after, corp_resolution = base * (1 - base) - after)
})

tables("sites", function(d) {
  strict <- list(threshold = 1e-12, maxiter = 10000, stepadj = 0.5)
  fit <- rma(yi, vi, data = d, method = "REML", test = "adhoc", control = strict)
  plain <- rma(yi, vi, data = d, method = "REML", control = strict)
  half <- qt(0.975, nrow(d) - 2) * sqrt(plain$tau2 + plain$se^2)
  # By default the search of the upper limit ends at a variance of 100.
  profile <- confint(fit, control = list(tol = 1e-12, tau2.max = 1e6, maxiter = 100000))$random
  moment <- rma(yi, vi, data = d, method = "DL")
  c(pooled = fit$b[1], pooled_low = fit$ci.lb, pooled_high = fit$ci.ub, tau2 = fit$tau2, q = fit$QE, i2 = fit$I2 / 100,
    i2_low = profile["I^2(%)", "ci.lb"] / 100, i2_high = profile["I^2(%)", "ci.ub"] / 100, dl_tau2 = moment$tau2,
    prediction_low = plain$b[1] - half, prediction_high = plain$b[1] + half)
})

tables("scanners", function(d) {
  difference <- d$first - d$second
  bias <- t.test(difference)$conf.int
  slope <- summary(lm(difference ~ I((first + second) / 2), data = d))$coefficients[2, ]
  long <- data.frame(value = c(d$first, d$second), slide = factor(rep(seq_len(nrow(d)), 2)),
                     scanner = factor(rep(1:2, each = nrow(d))))
  squares <- anova(lm(value ~ slide + scanner, data = long))
  ratio <- squares["slide", "F value"]
  df <- nrow(d) - 1
  limits <- ratio / c(qf(0.975, df, df), 1 / qf(0.975, df, df))
  consistency <- (c(ratio, limits) - 1) / (c(ratio, limits) + 1)
  c(bias_low = bias[1], bias_high = bias[2], scanner_slope = slope[[1]], scanner_slope_p = slope[[4]], icc = consistency[1],
    icc_low = consistency[2], icc_high = consistency[3])
})

tables("survival", function(d) {
  outcome <- Surv(d$time, d$status)
  curve <- survfit(outcome ~ 1, conf.type = "log-log")
  at <- summary(curve, times = d$horizon[1])
  mean_time <- summary(curve, rmean = d$horizon[1])$table
  group <- survdiff(outcome ~ group, data = d)
  stratified <- survdiff(outcome ~ group + strata(stratum), data = d)
  strict <- coxph.control(eps = 1e-13, iter.max = 100)
  efron <- coxph(outcome ~ x1 + x2, data = d, ties = "efron", control = strict)
  breslow <- coxph(outcome ~ x1 + x2 + strata(stratum), data = d, ties = "breslow", control = strict)
  hazards <- cox.zph(efron, transform = "km")$table
  rank <- concordance(outcome ~ x1, data = d, reverse = TRUE)
  c(survival = at$surv, survival_low = at$lower, survival_high = at$upper, restricted_mean = mean_time[["rmean"]],
    restricted_mean_error = mean_time[["se(rmean)"]], log_rank = group$chisq, stratified_log_rank = stratified$chisq,
    efron_x1 = efron$coefficients[[1]], efron_x1_error = sqrt(efron$var[1, 1]), efron_likelihood = efron$loglik[2],
    breslow_x2 = breslow$coefficients[[2]], breslow_x2_error = sqrt(breslow$var[2, 2]),
    proportional_x1 = hazards["x1", "chisq"], proportional_all = hazards["GLOBAL", "chisq"],
    harrell = rank$concordance[[1]], harrell_error = sqrt(rank$var[[1]]))
})
close(out)
versions <- sapply(c("pROC", "metafor", "survival"), function(name) as.character(packageVersion(name)))
writeLines(paste0(c("R", names(versions)), " ", c(as.character(getRversion()), versions)), file.path(folder, "versions.txt"))
